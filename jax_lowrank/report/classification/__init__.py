"""The report of a classification study: methods and groups side by side, from stored logits."""
