"""How people train today, in plain torch on the stock Hugging Face model: what our step is measured against."""
