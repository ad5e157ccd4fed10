"""Language models as files: what their next tokens, texts and tokenizer must keep, and transformers' own folder."""
