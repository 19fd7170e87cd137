/* hopper.cu: the maps that bulk tensor copies go by. The driver makes them; its function is asked of the runtime, so that nothing
 * links the driver.
 */
#include "kernels/cuda/hopper.cuh"

typedef CUresult (*encode_function)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                    const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                    CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static encode_function find_encode()
{
    void *function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? (encode_function)function : nullptr;
}

cudaError_t make_tensor_map(CUtensorMap *map, const struct tensor_view *view, bool is_bf16)
{
    static const encode_function encode = find_encode();
    if (!encode) return cudaErrorNotSupported;
    cuuint64_t sizes[5] = {64}, strides[4];
    const cuuint32_t boxes[5] = {64, view->box[0], 1, 1, view->box[1]}, steps[5] = {1, 1, 1, 1, 1};
    for (int i = 0; i < 4; i++) {
        sizes[i + 1] = view->size[i];
        strides[i] = view->size[i] == 1 ? 16 : view->stride[i] * 2; // of one there is no next
    }
    CUresult status = encode(map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5,
                             (void *)view->base, sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
