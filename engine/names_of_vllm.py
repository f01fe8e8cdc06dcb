"""Names of vLLM's Python API that DiSpec does not have, with the name or the way to use instead."""

_ENGINE = {
    "attention_backend": "the kernels follow from the device, leave it out",
    "chat_template": "it is read from the checkpoint, write it to the directory's chat_template.jinja",
    "compilation_config": "did you mean compile?",
    "cpu_offload_gb": "weights stay on the device, see quantization and kv_cache_dtype to need less memory",
    "data_parallel_size": "make an LLM for each device, or serve them with `dispec serve`",
    "disable_log_stats": "an LLM logs no statistics, leave it out",
    "distributed_executor_backend": "each rank of tensor_parallel_size is a process of its own, leave it out",
    "download_dir": "set the variable HF_HOME, or pass the directory of the checkpoint as model",
    "enable_chunked_prefill": "prompts are computed in chunks, see max_num_batched_tokens and max_prefill_chunk",
    "enable_lora": "adapters are not supported, merge them into the checkpoint",
    "guided_decoding_backend": "there is one grammar engine, leave it out",
    "hf_overrides": "change the checkpoint's config.json",
    "hf_token": "set the variable HF_TOKEN",
    "kv_cache_memory_bytes": "did you mean kv_cache_memory?",
    "kv_transfer_config": "did you mean kv_transfer?",
    "long_prefill_token_threshold": "did you mean max_prefill_chunk?",
    "num_gpu_blocks_override": "did you mean kv_cache_memory?",
    "pipeline_parallel_size": "did you mean tensor_parallel_size?",
    "revision": "download the revision, and pass its directory as model",
    "runner": "models generate text, leave it out",
    "skip_tokenizer_init": "prompts of token ids need no tokenizer, leave it out",
    "speculative_config": "did you mean speculative_model and num_speculative_tokens?",
    "structured_outputs_config": "there is one grammar engine, leave it out",
    "swap_space": "preempted sequences are computed again, leave it out",
    "task": "models generate text, leave it out",
    "tokenizer": "it is read from the checkpoint's directory, leave it out",
    "tokenizer_mode": "it is read from the checkpoint's tokenizer.json, leave it out",
    "trust_remote_code": "code of a checkpoint is never run, leave it out",
}
_SAMPLING = {
    "best_of": "did you mean n? Outputs with logprobs have a cumulative_logprob to choose by",
    "detokenize": "outputs always have text, leave it out",
    "guided_decoding": "did you mean structured_outputs?",
    "logits_processors": "see logit_bias, bad_words, allowed_token_ids and structured_outputs",
    "spaces_between_special_tokens": "the tokenizer's own decoder joins special tokens, leave it out",
    "truncate_prompt_tokens": "cut the prompt's token ids before the call",
    "use_beam_search": "there is no beam search, leave it out",
}
_CALL = {
    "lora_request": "adapters are not supported, merge them into the checkpoint",
    "params": "did you mean sampling_params?",
    "prompt_token_ids": 'pass lists of token ids, or mappings {"prompt_token_ids": …}, as prompts',
    "priority": "requests of the Python API are first come, first served, leave it out",
}

ADVICE = {
    "SamplingParams": _SAMPLING,
    **dict.fromkeys(("LLM", "AsyncLLM", "EngineOptions"), _ENGINE | {"params": "did you mean sampling_params?"}),
    **dict.fromkeys(("generate", "stream", "chat"), _CALL),
}
"""By the class or function that does not have the name."""
