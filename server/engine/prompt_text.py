"""Provisional."""


def prompt_text(tokenizer, token_ids):
    return "", [(0, 0)] * len(token_ids)
