"""What users type: one command group a file; console.py is the one place that prints."""
