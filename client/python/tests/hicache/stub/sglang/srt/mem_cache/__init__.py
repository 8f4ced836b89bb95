"""Stands in for SGLang in the fast tests: names and signatures only."""
