"""Fine-tuning for SPACE: data, chat formats, self-distillation, the trainer, acceptance on held-out prompts."""
