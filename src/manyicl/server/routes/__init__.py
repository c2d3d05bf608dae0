"""The routes of the API: tasks and their examples, answers, and OpenAI's completions."""
