# The one list of what gets compiled: one translation unit each. dtype | head dim | variant (row of common/tile_table.h)
set(HOPPER_FA_FORWARD_INSTANCES
    "bf16|64|default"
    "bf16|128|default"
    "bf16|256|default"
    "fp16|64|default"
    "fp16|128|default"
    "fp16|256|default"
    "e4m3|64|fp8"
    "e4m3|128|fp8"
    "e4m3|256|fp8"
    "int8|64|fp8"
    "int8|128|fp8"
    "int8|256|fp8"
    "e4m3|64|fp8_linear"
    "e4m3|128|fp8_linear"
    "int8|64|fp8_linear"
    "int8|128|fp8_linear"
    "e4m3|64|fp8_raw"
    "e4m3|128|fp8_raw"
    "e4m3|256|fp8_raw"
    "e4m3|256|fp8_flush"
    "int8|256|fp8_flush"
    "e4m3|64|fp8_keys"
    "e4m3|128|fp8_keys"
    "e4m3|256|fp8_keys"
    "int8|64|fp8_keys"
    "int8|128|fp8_keys"
    "int8|256|fp8_keys")

# Built only with -DHOPPER_FA_EXPERIMENTS=ON.
set(HOPPER_FA_FORWARD_EXPERIMENT_INSTANCES
    "bf16|128|no_warp_specialisation"
    "bf16|128|no_ping_pong"
    "bf16|128|no_overlap"
    "bf16|128|one_q_stage"
    "bf16|128|wide"
    "bf16|256|wide"
    "bf16|64|eager_rescale"
    "bf16|128|eager_rescale"
    "bf16|64|fma_exp2"
    "bf16|64|early_pass"
    "bf16|64|plain_store"
    "e4m3|128|fp8_no_ping_pong")

# Quantisation, by input type.
set(HOPPER_FA_QUANTIZE_INSTANCES "bf16" "fp16" "e4m3")

# dtype | head dim | variant (row of kBackwardTiles)
set(HOPPER_FA_BACKWARD_INSTANCES
    "bf16|64|default"
    "bf16|128|default"
    "bf16|256|default"
    "fp16|64|default"
    "fp16|128|default"
    "fp16|256|default"
    "bf16|64|quantized"
    "bf16|128|quantized"
    "bf16|256|quantized"
    "fp16|64|quantized"
    "fp16|128|quantized"
    "fp16|256|quantized"
    "bf16|64|quantized_rows"
    "bf16|128|quantized_rows"
    "fp16|64|quantized_rows"
    "fp16|128|quantized_rows")

# Built only with -DHOPPER_FA_EXPERIMENTS=ON.
set(HOPPER_FA_BACKWARD_EXPERIMENT_INSTANCES
    "bf16|64|no_dq_warpgroup")
