// Images on which a latent fires, in rows. Each opens the image with this latent's heat map.
import { show } from "./format";
import { Picture } from "./heat";
import type { Look } from "./look";
import { link } from "./route";
import type { Shot, ShotNames, Site } from "./types";

export function Shots({ site, shots, images, latent, maximum, look }: { site: Site; shots: Shot[]; images: ShotNames; latent: number; maximum: number; look: Look }) {
  if (!shots.length) return <p class="soft">There is none.</p>;
  return (
    <ul class="shots">
      {shots.map((shot) => {
        const [uri, label] = images[shot.image] ?? ["", ""];
        const name = label || uri || `image ${shot.image}`;
        return (
          <li key={shot.image}>
            <a href={link(`image/${shot.image}`, { latent })} title={uri}>
              <Picture site={site} image={shot.image} alt={name} heat={look.overlay ? shot : null} maximum={maximum} threshold={look.threshold} />
              <span class="label">{name}</span>
              <span class="soft"><span>{site.score} {show(shot.score)}</span> <span>peak {show(shot.peak)}</span></span>
              {!!shot.cls && <span class="tag" title="It fires on the CLS token, which lies nowhere in the image.">CLS {show(shot.cls)}</span>}
            </a>
          </li>
        );
      })}
    </ul>
  );
}

/** The part of an image around one patch, with the patch itself framed. */
export function Crop({ site, image, row, column, value, latent }: { site: Site; image: number; row: number; column: number; value: number | null; latent: number }) {
  const [rows, columns] = site.grid;
  const [height, width] = site.covered;
  const around = Math.min(3, rows, columns); // patches on a side
  const first = (place: number, n: number) => Math.min(Math.max(place - (around >> 1), 0), n - around);
  const top = first(row, rows);
  const left = first(column, columns);
  const across = columns / width; // patches on the whole picture
  const down = rows / height;
  return (
    <li>
      <a href={link(`image/${image}`, { latent, at: row * columns + column })} title={`image ${image}, row ${row}, column ${column}`}>
        <span class="crop">
          <span class="inner" style={{ width: `${(100 * across) / around}%`, left: `${(-100 * left) / around}%`, top: `${(-100 * top) / around}%` }}>
            <Picture site={site} image={image} alt={`patch at row ${row}, column ${column}`} heat={null} maximum={1} threshold={0} />
            <i style={{ left: `${(100 * column) / across}%`, top: `${(100 * row) / down}%`, width: `${100 / across}%`, height: `${100 / down}%` }} />
          </span>
        </span>
        <span class="soft">{show(value)}</span>
      </a>
    </li>
  );
}
