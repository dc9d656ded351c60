"""Data: sources of training examples, the forms of records, their encoding as tokens, and parts of a text."""
