// Links to the other versions beside this one. Without their list, or with this version alone, nothing is shown.
{
  const place = document.querySelector(".site-versions");
  const versions = window.patchsaeVersions || [];
  if (place && versions.some((version) => version !== place.dataset.current)) {
    place.append("Versions: ");
    for (const version of [...versions].reverse()) {
      const current = version === place.dataset.current;
      const shown = document.createElement(current ? "b" : "a");
      shown.textContent = version;
      if (!current) shown.href = `${place.dataset.root}${encodeURIComponent(version)}/index.html`;
      place.append(shown, " ");
    }
    place.hidden = false;
  }
}

// The lines that search shows of a page are fetched from it, which a browser refuses on the disk.
document.addEventListener("DOMContentLoaded", () => {
  if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
});
