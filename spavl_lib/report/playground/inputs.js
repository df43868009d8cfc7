"use strict";
// What the models read: text as token ids, and a picture as numbers. Both are computed as the
// library's processor does it. The tests compare every id, and every pixel to 1e-4.

// --- text ----------------------------------------------------------------------------------------

// A text without white space around it, as Python's `strip` leaves it.
const strip = (text) =>
  text.replace(/^[\p{White_Space}\x1c-\x1f]+|[\p{White_Space}\x1c-\x1f]+$/gu, "");

// A byte-level BPE tokenizer. `spec.tokens` holds the text of every token by id, `spec.merges` the
// pairs to join ("a b"), the first pair first, and `spec.special` the control tokens.
class Tokenizer {
  constructor(spec) {
    this.tokens = spec.tokens;
    this.ids = new Map(spec.tokens.map((token, id) => [token, id]));
    this.ranks = new Map(spec.merges.map((pair, rank) => [pair, rank]));
    this.special = spec.special;
    // GPT-2 writes each byte as a visible character: printable ones as they are, others from 256.
    this.letters = [];
    let next = 256;
    for (let byte = 0; byte < 256; byte++) {
      const printable =
        (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
      this.letters.push(String.fromCharCode(printable ? byte : next++));
    }
    this.bytes = new Map(this.letters.map((letter, byte) => [letter, byte]));
    // GPT-2 splits text at these borders before it joins any bytes.
    const s = "\\p{White_Space}", letter = "\\p{L}", digit = "\\p{N}";
    const words = `'(?:s|t|re|ve|m|ll|d)| ?${letter}+| ?${digit}+| ?[^${s}${letter}${digit}]+`;
    this.words = new RegExp(`${words}|${s}+(?![^${s}])|${s}+`, "gu");
  }

  // Ids of a text in which control tokens may stand, such as the prompt's template.
  encode(text) {
    for (const token of this.special) {
      const place = text.indexOf(token);
      if (place >= 0) {
        const after = text.slice(place + token.length);
        return [...this.encode(text.slice(0, place)), this.ids.get(token), ...this.encode(after)];
      }
    }
    return (text.match(this.words) || []).flatMap((word) => this.encodeWord(word));
  }

  encodeWord(word) {
    let pieces = [...new TextEncoder().encode(word)].map((byte) => this.letters[byte]);
    while (pieces.length > 1) {
      let best = -1, lowest = Infinity;
      for (let i = 0; i + 1 < pieces.length; i++) {
        const rank = this.ranks.get(pieces[i] + " " + pieces[i + 1]);
        if (rank < lowest) [best, lowest] = [i, rank];
      }
      if (best < 0) break;
      pieces.splice(best, 2, pieces[best] + pieces[best + 1]);
    }
    return pieces.map((piece) => this.ids.get(piece));
  }

  bytesOf(id) {
    if (this.special.includes(this.tokens[id])) return new Uint8Array(0);
    return Uint8Array.from(this.tokens[id], (letter) => this.bytes.get(letter));
  }

  // The text of some tokens, without control tokens.
  decode(ids) {
    return new TextDecoder().decode(Uint8Array.from(ids.flatMap((id) => [...this.bytesOf(id)])));
  }

  // Text in which nothing reads as a control token: `<image>` becomes `< image>`.
  neutralise(text) {
    for (const token of this.special)
      text = text.replaceAll(token, () => token[0] + " " + token.slice(1));
    return text;
  }
}

// --- a picture -----------------------------------------------------------------------------------

// The picture of a canvas (red, green, blue, opacity, 0 to 255) as the tower reads it: over white,
// padded to a square with the mean colour, made `spec.size` pixels wide, and normalised.
// Returns (3, size, size).
function preprocess(rgba, width, height, spec) {
  const side = Math.max(width, height);
  const left = Math.floor((side - width) / 2), top = Math.floor((side - height) / 2);
  const planes = [0, 1, 2].map((channel) => {
    const plane = new Uint8ClampedArray(side * side).fill(spec.background[channel]);
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++) {
        const at = 4 * (y * width + x);
        plane[(y + top) * side + x + left] = overWhite(rgba[at + channel], rgba[at + 3]);
      }
    return resize(plane, side, spec.size);
  });
  const area = spec.size * spec.size, values = new Float32Array(3 * area);
  planes.forEach((plane, channel) => {
    for (let i = 0; i < area; i++)
      values[channel * area + i] =
        (plane[i] * spec.factor - spec.mean[channel]) / spec.std[channel];
  });
  return values;
}

// A colour over white, in Pillow's integer arithmetic (its alpha_composite).
function overWhite(colour, opacity) {
  const sum = 128 * (colour * opacity + 255 * (255 - opacity) + 128);
  return ((sum >> 8) + sum) >> 15;
}

// Pillow's bicubic resize of a square channel, with its fixed-point weights: across, then down.
function resize(plane, side, size) {
  if (side === size) return plane;
  return resample(resample(plane, side, side, size, 1, side), side, size, size, size, 1);
}

// Resample `lines` lines of `length` pixels to `size` pixels each. Within a line, neighbours lie
// `step` apart; the first pixels of two lines lie `jump` apart. The result has the same direction.
function resample(plane, length, lines, size, step, jump) {
  const result = new Uint8ClampedArray(lines * size);
  const scale = length / size, stretch = Math.max(scale, 1), reach = 2 * stretch;
  for (let to = 0; to < size; to++) {
    const center = (to + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const end = Math.min(length, Math.trunc(center + reach + 0.5));
    const weights = [];
    for (let i = first; i < end; i++) weights.push(cubic((i - center + 0.5) / stretch));
    const total = weights.reduce((a, b) => a + b, 0);
    const fixed = weights.map((w) => {
      const exact = (w / total) * 2 ** 22;
      return Math.trunc(exact + (exact < 0 ? -0.5 : 0.5));
    });
    for (let line = 0; line < lines; line++) {
      let sum = 2 ** 21;
      for (let i = 0, at = line * jump + first * step; i < fixed.length; i++, at += step)
        sum += plane[at] * fixed[i];
      result[step === 1 ? line * size + to : to * lines + line] = Math.floor(sum / 2 ** 22);
    }
  }
  return result;
}

function cubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}
