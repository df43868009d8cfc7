"use strict";
// The forward pass of a small LLaVA: a CLIP tower, a projector and a Llama decoder with a cache of
// keys and values. Matrices are Float32Arrays in rows. Sums are formed in doubles.

// --- weights -------------------------------------------------------------------------------------

// All fp16 numbers as fp32, by their 16 bits.
function halves() {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31, fraction = bits & 1023;
    const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
    table[bits] = bits & 32768 ? -size : size;
  }
  return table;
}

// Makes the function that unpacks a tensor. A tensor is the sum of its parts; see weights.py.
// `packed` are the fp16 numbers of all parts, `starts` the places where they begin and end.
function unpacker(packed, starts) {
  const table = halves(), known = new Map();
  return (parts) => {
    const key = parts.join();
    if (!known.has(key)) {
      const values = new Float32Array(starts[parts[0] + 1] - starts[parts[0]]);
      for (const part of parts)
        for (let i = 0; i < values.length; i++) values[i] += table[packed[starts[part] + i]];
      known.set(key, values);
    }
    return known.get(key);
  };
}

// --- layers --------------------------------------------------------------------------------------

// x (rows, inner) times the transposed weight (outer, inner), plus a bias. Four rows share one walk
// through a row of the weight, which is what makes it fast.
function linear(x, rows, weight, outer, bias) {
  const inner = weight.length / outer, y = new Float32Array(rows * outer);
  let row = 0;
  for (; row + 4 <= rows; row += 4) {
    const a = row * inner, b = a + inner, c = b + inner, d = c + inner;
    for (let o = 0; o < outer; o++) {
      const w = o * inner, start = bias ? bias[o] : 0;
      let p = start, q = start, r = start, s = start;
      for (let i = 0; i < inner; i++) {
        const value = weight[w + i];
        p += value * x[a + i];
        q += value * x[b + i];
        r += value * x[c + i];
        s += value * x[d + i];
      }
      const at = row * outer + o;
      y[at] = p;
      y[at + outer] = q;
      y[at + 2 * outer] = r;
      y[at + 3 * outer] = s;
    }
  }
  for (; row < rows; row++)
    for (let o = 0; o < outer; o++) {
      let sum = bias ? bias[o] : 0;
      for (let i = 0, w = o * inner, a = row * inner; i < inner; i++)
        sum += weight[w + i] * x[a + i];
      y[row * outer + o] = sum;
    }
  return y;
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
  return x;
}

// Llama's norm: mean square 1 in every row. With a bias it is CLIP's layer norm, which first
// subtracts the row's mean.
function norm(x, weight, epsilon, bias) {
  const size = weight.length, y = new Float32Array(x.length);
  for (let at = 0; at < x.length; at += size) {
    let mean = 0, square = 0;
    if (bias) for (let i = 0; i < size; i++) mean += x[at + i] / size;
    for (let i = 0; i < size; i++) square += (x[at + i] - mean) ** 2 / size;
    const scale = 1 / Math.sqrt(square + epsilon);
    for (let i = 0; i < size; i++)
      y[at + i] = (x[at + i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
  }
  return y;
}

// The Gauss error function, to 2e-7 (Numerical Recipes, erfcc).
function erf(x) {
  const t = 1 / (1 + 0.5 * Math.abs(x));
  const terms = [0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806,
    0.09678418, 0.37409196, 1.00002368, -1.26551223];
  const tail = t * Math.exp(-x * x + terms.reduce((sum, term) => sum * t + term));
  return x >= 0 ? 1 - tail : tail - 1;
}

const activations = {
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  quick_gelu: (x) => x / (1 + Math.exp(-1.702 * x)),
  silu: (x) => x / (1 + Math.exp(-x)),
};

// Attention of `rows` queries to cached keys and values. `spec` has `heads`, `kvHeads` (groups of
// heads share keys and values) and the `size` of a head. Query r sees `seen(r)` positions.
function attend(queries, keys, values, rows, spec, seen) {
  const { heads, kvHeads, size } = spec, width = heads * size, kvWidth = kvHeads * size;
  const result = new Float32Array(rows * width), scale = 1 / Math.sqrt(size);
  const weights = new Float64Array(seen(rows - 1)), sums = new Float64Array(size);
  for (let row = 0; row < rows; row++)
    for (let head = 0; head < heads; head++) {
      const q = row * width + head * size, count = seen(row);
      const kv = Math.floor((head * kvHeads) / heads) * size;
      let highest = -Infinity, total = 0;
      for (let t = 0; t < count; t++) {
        let score = 0;
        for (let i = 0, k = t * kvWidth + kv; i < size; i++) score += queries[q + i] * keys[k + i];
        weights[t] = score * scale;
        if (weights[t] > highest) highest = weights[t];
      }
      for (let t = 0; t < count; t++) total += weights[t] = Math.exp(weights[t] - highest);
      sums.fill(0);
      for (let t = 0; t < count; t++) {
        const weight = weights[t] / total;
        for (let i = 0, v = t * kvWidth + kv; i < size; i++) sums[i] += weight * values[v + i];
      }
      result.set(sums, q);
    }
  return result;
}

// The index of the largest number, the first one if there are several.
function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

// Chances of all tokens.
function softmax(logits) {
  const highest = logits[argmax(logits)];
  const chances = Float64Array.from(logits, (logit) => Math.exp(logit - highest));
  const total = chances.reduce((a, b) => a + b);
  return chances.map((chance) => chance / total);
}

// --- the model -----------------------------------------------------------------------------------

// The tower's features of a picture (3, size, size): one row for each patch.
function tower(pixels, get, spec) {
  const { size, patch, width } = spec, side = size / patch, count = side * side + 1;
  const prefix = "vision_tower.";
  const patches = new Float32Array((count - 1) * 3 * patch * patch);
  let to = 0;
  for (let row = 0; row < side; row++)
    for (let column = 0; column < side; column++)
      for (let channel = 0; channel < 3; channel++)
        for (let y = 0; y < patch; y++)
          for (let x = 0; x < patch; x++)
            patches[to++] =
              pixels[(channel * size + row * patch + y) * size + column * patch + x];
  let states = new Float32Array(count * width);
  states.set(get(prefix + "embeddings.class_embedding"));
  const embedding = get(prefix + "embeddings.patch_embedding.weight");
  states.set(linear(patches, count - 1, embedding, width), width);
  add(states, get(prefix + "embeddings.position_embedding.weight"));
  const normed = (name) => norm(states, get(name + ".weight"), spec.epsilon, get(name + ".bias"));
  states = normed(prefix + "pre_layrnorm");
  for (let layer = 0; layer < spec.layers; layer++) {
    const name = `${prefix}encoder.layers.${layer}.`;
    const apply = (x, part, outer) =>
      linear(x, count, get(name + part + ".weight"), outer, get(name + part + ".bias"));
    const x = normed(name + "layer_norm1");
    const [q, k, v] = ["q", "k", "v"].map((p) => apply(x, `self_attn.${p}_proj`, width));
    const heads = { heads: spec.heads, kvHeads: spec.heads, size: width / spec.heads };
    add(states, apply(attend(q, k, v, count, heads, () => count), "self_attn.out_proj", width));
    const inner = apply(normed(name + "layer_norm2"), "mlp.fc1", spec.inner);
    add(states, apply(inner.map(activations[spec.activation]), "mlp.fc2", width));
  }
  return states.subarray(spec.withClass ? 0 : width);
}

// The projector: the tower's features as embeddings that the decoder reads.
function project(features, get, spec, visionWidth) {
  const rows = features.length / visionWidth, name = "multi_modal_projector.linear_";
  const bias = (n) => spec.projectorBias && get(`${name}${n}.bias`);
  const layer = (x, n) => linear(x, rows, get(`${name}${n}.weight`), spec.width, bias(n));
  return layer(layer(features, 1).map(activations[spec.projectorActivation]), 2);
}

// A Llama decoder. It keeps the keys and values of the tokens that it has read, so that a sequence
// with the same beginning is not computed again from the start.
class Decoder {
  constructor(get, spec) {
    Object.assign(this, { get, spec, ids: [], picture: null });
    const size = spec.kvHeads * spec.size * spec.context;
    this.cache = Array.from({ length: spec.layers }, () =>
      [new Float32Array(size), new Float32Array(size)]);
  }

  // Reads a sequence and returns the last hidden state of its last token. `image` is the id of the
  // places that take, in turn, the rows of `features`; `picture` names the features.
  read(ids, features, picture, image) {
    let known = 0;
    while (known < ids.length - 1 && ids[known] === this.ids[known] &&
      (ids[known] !== image || picture === this.picture)) known++;
    const { width } = this.spec, table = this.get("language_model.embed_tokens.weight");
    const states = new Float32Array((ids.length - known) * width);
    let slot = ids.slice(0, known).filter((id) => id === image).length;
    for (let n = known; n < ids.length; n++) {
      const from = ids[n] === image ? features : table, row = ids[n] === image ? slot++ : ids[n];
      states.set(from.subarray(row * width, (row + 1) * width), (n - known) * width);
    }
    Object.assign(this, { ids: [...ids], picture });
    return this.forward(states, known);
  }

  // Computes the layers for embeddings (rows, width) at positions from `start` on.
  forward(states, start) {
    const { spec, get } = this, { width, heads, kvHeads, size } = spec;
    const rows = states.length / width;
    for (let layer = 0; layer < spec.layers; layer++) {
      const name = `language_model.layers.${layer}.`, [keys, values] = this.cache[layer];
      const apply = (x, part, outer) => linear(x, rows, get(`${name}${part}.weight`), outer);
      const normed = (part) => norm(states, get(`${name}${part}.weight`), spec.epsilon);
      let x = normed("input_layernorm");
      const queries = this.rotate(apply(x, "self_attn.q_proj", heads * size), heads, start);
      const place = start * kvHeads * size;
      keys.set(this.rotate(apply(x, "self_attn.k_proj", kvHeads * size), kvHeads, start), place);
      values.set(apply(x, "self_attn.v_proj", kvHeads * size), place);
      const attended = attend(queries, keys, values, rows, spec, (row) => start + row + 1);
      add(states, apply(attended, "self_attn.o_proj", width));
      x = normed("post_attention_layernorm");
      const gate = apply(x, "mlp.gate_proj", spec.inner), up = apply(x, "mlp.up_proj", spec.inner);
      for (let i = 0; i < gate.length; i++) gate[i] = activations.silu(gate[i]) * up[i];
      add(states, apply(gate, "mlp.down_proj", width));
    }
    const last = states.subarray((rows - 1) * width);
    return norm(last, get("language_model.norm.weight"), spec.epsilon);
  }

  // Rotary positions: turns pairs of numbers by angles that grow with the position. Changes x.
  rotate(x, heads, start) {
    const { size, theta } = this.spec, half = size / 2;
    for (let at = 0, row = start; at < x.length; row++)
      for (let head = 0; head < heads; head++, at += size)
        for (let i = 0; i < half; i++) {
          const angle = row / theta ** (i / half);
          const cos = Math.cos(angle), sin = Math.sin(angle), a = x[at + i], b = x[at + half + i];
          x[at + i] = a * cos - b * sin;
          x[at + half + i] = b * cos + a * sin;
        }
    return x;
  }

  logits(state) {
    const head = this.get("lm_head.weight");
    return linear(state, 1, head, head.length / this.spec.width);
  }
}
