"""Twenty short questions, the same for every benchmark that needs text."""

PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short poem about the sea.",
    "List three uses of a paper clip.",
    "How does a bicycle stay upright?",
    "What is the difference between weather and climate?",
    "Describe a good breakfast.",
    "Why do cats purr?",
    "Tell me a short story about a lighthouse keeper.",
    "What is a prime number?",
    "How do I boil an egg?",
    "Name a famous scientist and what they discovered.",
    "What does an operating system do?",
    "Give me two tips for sleeping better.",
    "Who wrote Hamlet, and what is it about?",
    "What makes bread rise?",
    "Translate 'good morning' into Spanish.",
    "Why is exercise healthy?",
    "What is the largest planet in the solar system?",
    "Write a polite email that declines an invitation.",
)
