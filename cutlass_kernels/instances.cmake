# The one list of what gets compiled, a translation unit a line: family | dtypes | head dim | variant (row of the
# family's tile table). NOTE: the headers cost most of a unit's time, so dtypes that share a tile share a unit.
set(HOPPER_FA_INSTANCES
    "forward|bf16,fp16|64|default"
    "forward|bf16,fp16|128|default"
    "forward|bf16,fp16|256|default"
    "forward|e4m3,int8|64|fp8"
    "forward|e4m3,int8|128|fp8"
    "forward|e4m3,int8|256|fp8"
    "forward|e4m3,int8|64|fp8_linear"
    "forward|e4m3,int8|128|fp8_linear"
    "forward|e4m3|64|fp8_raw"
    "forward|e4m3|128|fp8_raw"
    "forward|e4m3|256|fp8_raw"
    "forward|e4m3,int8|256|fp8_flush"
    "backward|bf16,fp16|64|default"
    "backward|bf16,fp16|128|default"
    "backward|bf16,fp16|256|default"
    "backward|bf16,fp16|64|quantized"
    "backward|bf16,fp16|128|quantized"
    "backward|bf16,fp16|256|quantized"
    "backward|bf16,fp16|64|quantized_rows"
    "backward|bf16,fp16|128|quantized_rows")

# Built only with HOPPER_FA_KEY_SCALES: recipes with a scale or an addend for every key.
set(HOPPER_FA_KEY_SCALE_INSTANCES
    "forward|e4m3,int8|64|fp8_keys"
    "forward|e4m3,int8|128|fp8_keys"
    "forward|e4m3,int8|256|fp8_keys")

# Built only with HOPPER_FA_EXPERIMENTS.
set(HOPPER_FA_EXPERIMENT_INSTANCES
    "forward|bf16|128|no_warp_specialisation"
    "forward|bf16|128|no_ping_pong"
    "forward|bf16|128|no_overlap"
    "forward|bf16|128|one_q_stage"
    "forward|bf16|128|wide"
    "forward|bf16|256|wide"
    "forward|bf16|64|eager_rescale"
    "forward|bf16|128|eager_rescale"
    "forward|bf16|64|fma_exp2"
    "forward|bf16|64|early_pass"
    "forward|bf16|64|plain_store"
    "forward|e4m3|128|fp8_no_ping_pong"
    "backward|bf16|64|no_dq_warpgroup")

# Quantisation, by input type; one unit. That of e4m3 is always built.
set(HOPPER_FA_QUANTIZE_DTYPES bf16 fp16 e4m3)
