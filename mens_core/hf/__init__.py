"""What can be learned from a Hugging Face folder without a tensor library."""
