"""Process groups of student and teacher, and what travels between them."""
