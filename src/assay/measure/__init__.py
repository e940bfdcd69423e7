"""The measuring side: knows clocks, loops and statistics, and nothing of language models."""
