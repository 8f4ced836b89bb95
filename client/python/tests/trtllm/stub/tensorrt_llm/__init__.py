"""Stands in for TensorRT-LLM where it is not installed: the names that a connector meets, and nothing behind
them.
"""
