"""The fields of requests that vLLM documents, by route, from its protocol of 2026-11; and older ones still in use."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SHARED = _names("""
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty response_format seed stop stream
    stream_options temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking length_penalty
    stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words
    add_special_tokens structured_outputs priority request_id session_id return_tokens_as_token_ids return_token_ids
    routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params
    vllm_xargs repetition_detection thinking_token_budget stream_interval echo
""")
_OLDER = _names("""
    best_of guided_json guided_regex guided_choice guided_grammar guided_decoding_backend logits_processors
""")

CHAT = (
    _SHARED
    | _OLDER
    | _names("""
    messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort include_reasoning
    parallel_tool_calls add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs return_prompt_text
""")
)
COMPLETION = _SHARED | _OLDER | _names("prompt suffix prompt_embeds")
TOKENIZE = _names("""
    model prompt messages add_special_tokens return_token_strs add_generation_prompt continue_final_message
    chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs tools
""")
DETOKENIZE = _names("model tokens")
RESPONSES = _names("""
    background include input instructions max_output_tokens max_tool_calls metadata model logit_bias parallel_tool_calls
    previous_response_id previous_response prompt reasoning service_tier store stream temperature text tool_choice tools
    top_logprobs top_p top_k truncation user skip_special_tokens include_stop_str_in_output presence_penalty
    frequency_penalty prompt_cache_key request_id media_io_kwargs mm_processor_kwargs priority cache_salt
    enable_response_messages previous_input_messages structured_outputs repetition_penalty seed stop ignore_eos
    vllm_xargs kv_transfer_params chat_template_kwargs
""")
MESSAGES = _names("""
    model messages max_tokens metadata output_config stop_sequences stream system temperature tool_choice tools top_k
    top_p kv_transfer_params chat_template_kwargs
""")
