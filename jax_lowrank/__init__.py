"""What does low-rank fine-tuning leave behind, compared with full fine-tuning?"""

__version__ = "0.1.0"
