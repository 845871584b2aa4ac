"""OpenAI's Responses API: `/v1/responses`, with responses kept for `previous_response_id`."""
