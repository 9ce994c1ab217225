"""What a checkpoint is worth: perplexity of texts and answers to multiple-choice questions, per width. Offline."""
