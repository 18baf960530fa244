"""Measures of generated text: n-gram likelihood, diversity, distance from real text, overlap with references."""
