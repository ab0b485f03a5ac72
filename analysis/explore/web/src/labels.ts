// Names beside points, where there are few enough of them to be read.

export interface Box {
  left: number;
  top: number;
  right: number;
  bottom: number;
}

const MOST = 120; // points; with more, a name says little about where it belongs
const HEIGHT = 13;
const GAP = 6; // pixels between a point and its name
const LONGEST = 18; // letters

/** Write the names that have room: beside their point, over no other name, and within `room`. */
export function nameFew(context: CanvasRenderingContext2D, points: { x: number; y: number; latent: number }[], nameOf: (latent: number) => string, room: Box): void {
  if (points.length > MOST) return;
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  const taken: Box[] = points.map(({ x, y }) => ({ left: x - 3, right: x + 3, top: y - 3, bottom: y + 3 }));
  for (const { x, y, latent } of points) {
    const name = shorten(nameOf(latent));
    if (!name) continue;
    const width = context.measureText(name).width;
    for (const left of [x + GAP, x - GAP - width]) {
      const box: Box = { left, right: left + width, top: y - HEIGHT / 2, bottom: y + HEIGHT / 2 };
      if (box.left < room.left || box.right > room.right || taken.some((other) => overlap(box, other))) continue;
      context.textAlign = "left";
      context.fillText(name, left, y);
      taken.push(box);
      break;
    }
  }
  context.textBaseline = "alphabetic";
}

const shorten = (name: string) => (name.length > LONGEST ? `${name.slice(0, LONGEST - 1)}…` : name);

const overlap = (a: Box, b: Box) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
