"""Results laid side by side: claims with their verdicts, tables, figures and one HTML page.

Everything here starts from a `results.StudyResult` and calls `evaluation`; nothing needs a model.
"""
