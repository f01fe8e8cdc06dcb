// A picture of the KV cache's blocks: used ones first, then cached ones, then free ones.

import { integer, percent, plural } from "./format.js";

const MOST_CELLS = 1000;
const GAP = 1; // pixels between cells
const LARGEST = 16; // pixels of a cell

// Each cell stands for the same number of blocks; a kind with any blocks has at least one cell.
export function poolCells({ used, cached, total }) {
  const perCell = Math.max(1, Math.ceil(total / MOST_CELLS));
  const count = Math.ceil(total / perCell);
  const usedCells = Math.min(count, Math.ceil(used / perCell));
  const cachedCells = Math.min(count - usedCells, Math.ceil(cached / perCell));
  return { perCell, count, used: usedCells, cached: cachedCells };
}

export function drawPool(pool, blockSize, color) {
  const canvas = document.getElementById("pool");
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !pool) return;
  const cells = poolCells(pool);
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const size = cellSize(cells.count, width, height);
  const columns = Math.floor(width / size);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  let cell = 0;
  for (const [name, end] of [["decode", cells.used], ["cached", cells.used + cells.cached], ["free", cells.count]]) {
    context.fillStyle = color(name);
    for (; cell < end; cell++) {
      context.fillRect((cell % columns) * size, Math.floor(cell / columns) * size, size - GAP, size - GAP);
    }
  }
  const share = (name) => `${percent(pool[name] / pool.total)} ${name}`;
  canvas.setAttribute("aria-label", `KV cache blocks: ${["used", "cached", "free"].map(share).join(", ")}`);
  const each = cells.perCell > 1 ? `, each cell ${integer(cells.perCell)}` : "";
  document.getElementById("pool-scale").textContent = `${plural(pool.total, "block")} of ${integer(blockSize)} tokens${each}`;
}

// The largest whole number of pixels with which all cells fit.
function cellSize(count, width, height) {
  let size = LARGEST;
  while (size > 2 && Math.floor(width / size) * Math.floor(height / size) < count) size--;
  return size;
}
