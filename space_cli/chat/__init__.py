"""Conversations: templates turn them into token ids, sessions answer them. Knows no terminal.

`templates` stands below `models`, which read prompts by it; `conversation` above `models`, `session` above `api`.
"""
