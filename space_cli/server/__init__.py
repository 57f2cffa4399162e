"""`space serve`: OpenAI's HTTP interface over `space_cli.api`."""
