"""What belongs to a published model besides its weights and its code."""
