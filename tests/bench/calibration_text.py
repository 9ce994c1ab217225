"""Samples the calibration text that ships with AnyBit: what a served model says about many things at 8 bits.

    anybit serve --kv-cache-mib 2000 --max-num-seqs 32 &
    python tests/bench/calibration_text.py engine/quantize/calibration.txt

Topics are taken from everyday life, sciences, arts and computing, so that activations of many kinds are seen.
"""

import argparse
import asyncio
from pathlib import Path

import httpx

TOPICS = (
    "how to install software on a server",
    "the history of the printing press",
    "why the sky is blue",
    "a recipe for vegetable soup",
    "how a file system stores data",
    "the causes of the French Revolution",
    "a short story about a lighthouse keeper",
    "how to choose a password",
    "what photosynthesis does",
    "a letter asking for a refund",
    "the rules of chess",
    "how databases keep data safe",
    "the life of Marie Curie",
    "planning a small garden",
    "what a network router does",
    "the water cycle",
    "a dialogue between a doctor and a patient",
    "how to back up a computer",
    "the planets of the solar system",
    "an argument for public libraries",
    "how bridges carry loads",
    "the work of a bank",
    "a fable about a fox and a crow",
    "how to write a clear report",
    "why volcanoes erupt",
    "the basics of probability",
    "a day in a fishing village",
    "how elections are held",
    "configuring a web server step by step",
    "the human heart",
    "how bread is made",
    "the industrial revolution",
    "what inflation means",
    "a poem about autumn, explained",
    "how to train for a long run",
    "the structure of an atom",
    "package management in an operating system",
    "how bees live together",
    "the art of negotiation",
    "a travel guide to a mountain town",
    "how vaccines work",
    "the Roman roads",
    "why we sleep",
    "how to learn a language",
    "the properties of metals",
    "user permissions and security on a shared computer",
    "climate and weather",
    "how a court trial proceeds",
    "an interview with a carpenter",
    "how to solve a quadratic equation",
    "music of the baroque",
    "the economics of farming",
    "partitioning a disk and mounting it",
    "how ships navigate",
    "a review of a novel",
    "the immune system",
    "electric circuits",
    "how cities grow",
    "the story of zero",
    "keeping a machine's software up to date",
    "friendship",
    "how glass is made",
    "a speech at a graduation",
    "ocean currents",
    "the scientific method",
    "how to edit a text file from the command line",
    "folk tales of the north",
    "the causes of rust",
    "designing an experiment",
    "how a compiler works",
    "the migration of birds",
    "managing a small team",
    "the Silk Road",
    "light and lenses",
    "writing good documentation",
    "how to care for a cat",
    "the right to privacy",
    "free software licences",
    "logic puzzles",
    "the discovery of penicillin",
    "railways",
    "e-mail and how it travels",
    "a conversation about the future",
)
FORMS = (
    "Write a detailed article about {}.",
    "Explain {} to a beginner, step by step.",
    "Give a long, thoughtful answer: {}.",
    "Write several paragraphs on {}, with examples.",
)
ROUNDS = 2
FIRST_SEED = 1000


async def sample(base_url: str) -> str:
    """Questions and answers, one after the other."""
    requests = [
        FORMS[(index + number) % len(FORMS)].format(topic)
        for number in range(ROUNDS)
        for index, topic in enumerate(TOPICS)
    ]
    async with httpx.AsyncClient(base_url=base_url, timeout=3600, limits=httpx.Limits(max_connections=32)) as client:

        async def answer(index: int) -> str:
            body = {
                "messages": [{"role": "user", "content": requests[index]}],
                "max_tokens": 640,
                "temperature": 0.9,
                "top_p": 0.98,
                "seed": FIRST_SEED + index,
                "bit_width": 8,
            }
            response = await client.post("/v1/chat/completions", json=body)
            response.raise_for_status()
            return f"{requests[index]}\n\n{response.json()['choices'][0]['message']['content'].strip()}"

        return "\n\n".join(await asyncio.gather(*map(answer, range(len(requests))))) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    arguments.destination.write_text(asyncio.run(sample(arguments.base_url)), encoding="utf-8")


if __name__ == "__main__":
    main()
