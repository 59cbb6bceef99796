// From a picture to the network's input, pixel for pixel as preprocess.py and Pillow do it. No page, no network.
"use strict";

const MAX_ASPECT = 32; // as preprocess.py
const MAX_CANVAS_PIXELS = 16777216; // larger canvases fail on iOS
const PRECISION_BITS = 32 - 8 - 2; // Pillow's fixed point for 8-bit images
const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: cubic },
};

/** Keys' cubic with a = -0.5, Pillow's bicubic. */
function cubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** Decode a file upright, without colour management, over white -> {width, height, data: RGB bytes}. */
async function decode(blob) {
  const bitmap = await createImageBitmap(blob, {
    colorSpaceConversion: "none",
    imageOrientation: "from-image",
    premultiplyAlpha: "default",
  });
  const { width, height } = bitmap;
  const rows = Math.max(1, Math.min(height, Math.floor(MAX_CANVAS_PIXELS / width))); // a strip at a time
  const canvas = new OffscreenCanvas(width, rows);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  const data = new Uint8Array(3 * width * height);
  for (let top = 0; top < height; top += rows) {
    context.fillRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, -top);
    const count = Math.min(rows, height - top);
    dropAlpha(context.getImageData(0, 0, width, count).data, data, 3 * width * top);
  }
  bitmap.close();
  return { width, height, data };
}

function dropAlpha(rgba, rgb, start) {
  for (let i = 0, j = start; i < rgba.length; i += 4) {
    rgb[j++] = rgba[i];
    rgb[j++] = rgba[i + 1];
    rgb[j++] = rgba[i + 2];
  }
}

/** RGB -> grey as Pillow's convert("L"): ITU-R 601-2 in 16-bit fixed point. */
function toGrey({ width, height, data }) {
  const grey = new Uint8Array(width * height);
  for (let i = 0; i < grey.length; i++) {
    grey[i] = (data[3 * i] * 19595 + data[3 * i + 1] * 38470 + data[3 * i + 2] * 7471 + 0x8000) >> 16;
  }
  return { width, height, data: grey };
}

/** Python's round: halves go to the even neighbour. */
function round(x) {
  const floor = Math.floor(x);
  return x - floor === 0.5 ? floor + (floor % 2) : Math.round(x);
}

/** The square of side img_size that the network sees, as resize_and_crop in preprocess.py. */
function resizeAndCrop(image, p) {
  image = limitAspect(image);
  const short = Math.floor(p.img_size / p.crop_pct);
  const { width, height } = image;
  const size =
    width <= height
      ? [short, Math.trunc((short * height) / width)]
      : [Math.trunc((short * width) / height), short];
  if (size[0] !== width || size[1] !== height) image = resize(image, size[0], size[1], p.interpolation);
  return crop(image, round((size[0] - p.img_size) / 2), round((size[1] - p.img_size) / 2), p.img_size, p.img_size);
}

function limitAspect(image) {
  const longest = MAX_ASPECT * Math.min(image.width, image.height);
  const width = Math.min(image.width, longest);
  const height = Math.min(image.height, longest);
  if (width === image.width && height === image.height) return image;
  return crop(image, Math.floor((image.width - width) / 2), Math.floor((image.height - height) / 2), width, height);
}

function crop({ width, height, data }, left, top, newWidth, newHeight) {
  const channels = data.length / (width * height);
  const out = new Uint8Array(newWidth * newHeight * channels);
  for (let y = 0; y < newHeight; y++) {
    const start = ((y + top) * width + left) * channels;
    out.set(data.subarray(start, start + newWidth * channels), y * newWidth * channels);
  }
  return { width: newWidth, height: newHeight, data: out };
}

/** Pillow's resize: rows first, then columns, each rounded to 8 bits. */
function resize(image, width, height, interpolation) {
  if (interpolation === "nearest") return nearest(image, width, height);
  const filter = FILTERS[interpolation];
  if (width !== image.width) image = resizeAxis(image, width, coefficients(image.width, width, filter), true);
  if (height !== image.height) image = resizeAxis(image, height, coefficients(image.height, height, filter), false);
  return image;
}

function nearest({ width, height, data }, newWidth, newHeight) {
  const channels = data.length / (width * height);
  const [columns, rows] = [nearestOf(width, newWidth), nearestOf(height, newHeight)];
  const out = new Uint8Array(newWidth * newHeight * channels);
  let i = 0;
  for (const y of rows) {
    for (const x of columns) {
      for (let c = 0; c < channels; c++) out[i++] = data[(y * width + x) * channels + c];
    }
  }
  return { width: newWidth, height: newHeight, data: out };
}

/** The input position of each output position; summed up as Pillow does, which decides at exact halves. */
function nearestOf(inSize, outSize) {
  const scale = inSize / outSize;
  const positions = [];
  for (let at = scale * 0.5; positions.length < outSize; at += scale) positions.push(Math.floor(at));
  return positions;
}

/** For each output position the first input position and the fixed-point weights; wider when shrinking. */
function coefficients(inSize, outSize, filter) {
  const scale = inSize / outSize;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  return Array.from({ length: outSize }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(inSize, Math.trunc(centre + support + 0.5));
    const weights = [];
    let sum = 0;
    for (let x = first; x < last; x++) {
      const w = filter.weight((x - centre + 0.5) * (1 / stretch));
      weights.push(w);
      sum += w;
    }
    const fixed = weights.map((w) => {
      const v = (sum !== 0 ? w * (1 / sum) : w) * (1 << PRECISION_BITS);
      return Math.trunc(v < 0 ? v - 0.5 : v + 0.5);
    });
    return { first, weights: fixed };
  });
}

function resizeAxis({ width, height, data }, size, taps, horizontal) {
  const channels = data.length / (width * height);
  const newWidth = horizontal ? size : width;
  const newHeight = horizontal ? height : size;
  const step = horizontal ? channels : width * channels; // from one tap to the next
  const out = new Uint8Array(newWidth * newHeight * channels);
  for (let y = 0, i = 0; y < newHeight; y++) {
    for (let x = 0; x < newWidth; x++) {
      const { first, weights } = taps[horizontal ? x : y];
      const start = horizontal ? (y * width + first) * channels : (first * width + x) * channels;
      for (let c = 0; c < channels; c++) {
        let sum = 1 << (PRECISION_BITS - 1);
        for (let k = 0, from = start + c; k < weights.length; k++, from += step) sum += data[from] * weights[k];
        out[i++] = Math.min(255, Math.max(0, sum >> PRECISION_BITS));
      }
    }
  }
  return { width: newWidth, height: newHeight, data: out };
}

/** (value / 255 - mean) / std as float32, channels first. */
function normalise({ width, height, data }, p) {
  const out = new Float32Array(width * height * p.in_chans);
  for (let c = 0, i = 0; c < p.in_chans; c++) {
    const scale = Math.fround(1 / Math.fround(255 * Math.fround(p.std[c])));
    const offset = Math.fround(Math.fround(p.mean[c]) / Math.fround(p.std[c]));
    for (let j = c; j < data.length; j += p.in_chans) out[i++] = Math.fround(data[j] * scale) - offset;
  }
  return out;
}

/** Refuse a grey PNG of 16 bits if the network expects fewer bits in use: browsers keep the upper 8 of all 16. */
async function checkDepth(blob, p) {
  const start = new Uint8Array(await blob.slice(0, 26).arrayBuffer());
  const isPng = String.fromCharCode(...start.subarray(1, 4)) === "PNG";
  if (p.bits < 16 && isPng && start[24] === 16 && start[25] === 0) {
    throw new Error(
      `This picture has 16 bits, of which the model reads ${p.bits}; a browser cannot. Save it with 8 bits, ` +
        "or classify it with convmixer predict.",
    );
  }
}

/** A file -> what the network sees, as bytes and as input. */
async function prepare(blob, p) {
  await checkDepth(blob, p);
  const image = await decode(blob);
  const seen = resizeAndCrop(p.in_chans === 1 ? toGrey(image) : image, p);
  return { seen, input: normalise(seen, p) };
}
