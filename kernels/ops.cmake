# One line per op; the order is that of the forward pass.
cambium_op(embedding CPU_ONLY)
cambium_op(rms_norm CPU_ONLY)
cambium_op(qk_norm_rope CPU_ONLY)
cambium_op(attention CPU_ONLY)
cambium_op(expert_load CPU_ONLY)
cambium_op(dispatch_plan CPU_ONLY)
cambium_op(routing_sort CPU_ONLY)
cambium_op(cross_entropy CPU_ONLY)
cambium_op(leaf_fold CPU_ONLY)
cambium_op(linear CPU_ONLY)
cambium_op(swiglu CPU_ONLY)
cambium_op(grad_merge CPU_ONLY)
cambium_op(grouped_gemm CPU_ONLY)
cambium_op(copy CPU_ONLY)
cambium_op(metric_sum CPU_ONLY)

# References that wait for their parity tests and benchmarks: each becomes a cambium_op line.
foreach(name router_topk balance_loss z_loss expert_load routing_sort dispatch_plan
             permute combine adamw grad_norm param_digest)
  list(APPEND CAMBIUM_REFERENCE_SOURCES reference/${name}.cc)
endforeach()
