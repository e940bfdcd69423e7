"""Tables, Markdown, HTML and charts, all pure functions of records; runs without torch."""
