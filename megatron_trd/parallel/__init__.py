"""Process groups of student and teacher, and the data exchanged between them."""
