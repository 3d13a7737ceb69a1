"""Composition only: each flow reads as the sentence that describes it."""
