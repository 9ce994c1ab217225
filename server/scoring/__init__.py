"""A running server's answers scored through its API: perplexity of texts and multiple-choice questions."""
