"""HTTP, the OpenAI protocol, admission, streaming, metrics and the command line. Never imports torch."""
