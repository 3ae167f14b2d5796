"""Finetune and evaluate CLIP models for image-text retrieval."""
