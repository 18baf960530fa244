"""Measures of generated text: n-gram likelihood, diversity and overlap with references."""
