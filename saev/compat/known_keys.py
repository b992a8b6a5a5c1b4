"""Config keys of other libraries that do not change what an SAE computes. All others are used or refused.

`saev.compat.upstream` has those of upstream checkpoints.
"""

SAELENS = frozenset(
    """
    act_store_device activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_lm autocast_sae
    aux_loss_coefficient b_dec_init_method begin_batch_token begin_sequence_token buffer_size_gb
    cached_activations_path checkpoint_path column_name compile_llm compile_sae context_size data_dir
    data_files dataset_name dataset_path dataset_trust_remote_code dead_feature_threshold dead_feature_window
    decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init device
    disable_concat_sequences eval_batch_size_prompts eval_every_n_wandb_logs exclude_special_tokens
    expansion_factor feature_reinit_scale feature_sampling_method feature_sampling_window finetuning_method
    finetuning_tokens from_pretrained_path hf_hook_name hf_hook_name_out hf_is_private_repo hf_num_shards
    hf_repo_id hf_revision hook_eval hook_head_index hook_head_index_out hook_layer hook_name hook_name_out
    hook_point hook_point_eval hook_point_head_index hook_point_layer init_encoder_as_decoder_transpose
    is_dataset_on_disk is_dataset_tokenized jumprelu_bandwidth jumprelu_init_threshold
    jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale l0_coefficient l0_lambda
    l0_warm_up_steps l1_coefficient l1_warm_up_steps llm_compilation_mode llm_device
    log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb log_weights_to_wandb logger
    lp_norm lr lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps matryoshka_widths model_batch_size
    model_class_name model_from_pretrained_kwargs model_kwargs model_name mse_loss_normalization
    n_batches_for_norm_estimate n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles
    neuronpedia_id new_cached_activations_path noise_factor noise_scale normalize_sae_decoder num_proc
    output_path pre_act_loss_coefficient prefetch_llm_batches prepend_bos pretokenize_batch_size
    resample_batches resume resume_from_checkpoint run_name sae_compilation_mode sae_lens_training_version
    save_final_checkpoint save_path scale_sparsity_penalty_by_decoder_norm seed seqpos_slice
    sequence_separator_token shuffle sparsity_penalty split store_batch_size store_batch_size_prompts
    streaming target_l0 tokenizer_name tokens_per_buffer topk_threshold_lr total_training_samples
    total_training_tokens train_batch_size train_batch_size_samples train_batch_size_tokens training_tokens
    use_cached_activations use_chat_formatting use_ghost_grads use_matryoshka_aux_loss use_sparse_activations
    verbose wandb_entity wandb_id wandb_log_frequency wandb_project
    """.split()  # noqa: SIM905
)
"""In cfg.json: training, logging and the source of the activations."""

DICTIONARY_LEARNING = frozenset(
    """
    anneal_end anneal_start auxk_alpha bandwidth dead_feature_threshold decay_start device group_fractions
    group_sizes group_weights initial_sparsity_penalty l1_penalty layer lm_name lr n_sparsity_updates p_end
    p_start resample_steps seed sparsity_function sparsity_penalty sparsity_queue_length sparsity_warmup_steps
    steps submodule_name target_l0 threshold_beta threshold_start_step top_k_aux trainer_class wandb_name
    warmup_steps
    """.split()  # noqa: SIM905
)
"""In config.json, under "trainer"."""

SPARSIFY = frozenset(["multi_topk", "normalize_decoder"])
"""In cfg.json."""
