"""The HTTP API of the gateway: OpenAI's images API over the workflows that it serves."""
