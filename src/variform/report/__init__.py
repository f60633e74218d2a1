"""What a form is, in words, and what it costs."""
