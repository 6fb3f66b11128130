# One line per op; the order is that of the forward pass.
cambium_op(embedding CPU_ONLY)
cambium_op(rms_norm CPU_ONLY)
cambium_op(qk_norm_rope CPU_ONLY)
cambium_op(attention CPU_ONLY)
cambium_op(cross_entropy CPU_ONLY)
cambium_op(leaf_fold CPU_ONLY)
