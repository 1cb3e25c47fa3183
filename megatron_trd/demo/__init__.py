"""The embedded world: a task, two small models that do it, and the script that made them."""
