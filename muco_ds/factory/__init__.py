"""Makes training data: turns written by a vision-language model behind an endpoint, and pictures fetched from URLs."""
