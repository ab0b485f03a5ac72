// Very many points: they are written into the pixels of one picture, because 50,000 calls of a canvas take a quarter of a
// second.

/** The color of a point as it lies in the pixels: red, green, blue, alpha from 0 to 255. */
type Pixel = [number, number, number, number];

export class Dots {
  private readonly pixels: ImageData;
  private readonly known = new Map<string, Pixel>();
  private readonly probe = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });

  /** `scale`: pixels of the canvas for each of CSS. */
  constructor(width: number, height: number, private readonly scale: number) {
    this.pixels = new ImageData(Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)));
  }

  /** A square around a point, over what is there. */
  add(x: number, y: number, radius: number, color: string, opacity: number): void {
    const { width, height, data } = this.pixels;
    const [red, green, blue, alpha] = this.read(color);
    const side = Math.max(1, Math.round(2 * radius * this.scale));
    const left = Math.round(x * this.scale - side / 2);
    const top = Math.round(y * this.scale - side / 2);
    for (let row = Math.max(0, top); row < Math.min(height, top + side); row++)
      for (let column = Math.max(0, left); column < Math.min(width, left + side); column++) {
        const place = 4 * (row * width + column);
        data[place] = red;
        data[place + 1] = green;
        data[place + 2] = blue;
        data[place + 3] = alpha * opacity;
      }
  }

  /** Lay all points over what the canvas shows; its transform and clip hold. */
  draw(context: CanvasRenderingContext2D): void {
    const { width, height } = this.pixels;
    const picture = new OffscreenCanvas(width, height);
    picture.getContext("2d")?.putImageData(this.pixels, 0, 0);
    context.drawImage(picture, 0, 0, width / this.scale, height / this.scale);
  }

  /** A CSS color as pixels: the browser reads it. */
  private read(color: string): Pixel {
    let found = this.known.get(color);
    if (!found) {
      const probe = this.probe;
      if (probe) {
        probe.clearRect(0, 0, 1, 1);
        probe.fillStyle = color;
        probe.fillRect(0, 0, 1, 1);
      }
      found = [...(probe?.getImageData(0, 0, 1, 1).data ?? [0, 0, 0, 255])] as Pixel;
      this.known.set(color, found);
    }
    return found;
  }
}
