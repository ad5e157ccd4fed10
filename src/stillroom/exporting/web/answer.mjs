// The model in onnxruntime-web, one thread of WebAssembly: the page and the verification both answer through this.
import * as ort from "./ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;

const ARRAYS = {float32: Float32Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array};

export async function open() {
  const session = await ort.InferenceSession.create(new URL("model.onnx", import.meta.url).href, {executionProviders: ["wasm"]});
  // inputs: [{name, dtype, dims, data: ArrayBuffer}] -> {dims, data: Float32Array}
  return async (inputs) => {
    const feed = {};
    for (const one of inputs) feed[one.name] = new ort.Tensor(one.dtype, new ARRAYS[one.dtype](one.data), one.dims);
    const found = await session.run(feed);
    const output = found[session.outputNames[0]];
    return {dims: output.dims, data: output.data};
  };
}
