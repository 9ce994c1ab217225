"""How pages of keys and values are compressed: each format's codes, its bits and its oracle."""
