// Before `quarto render paper/`: put the numbers of the wanted run beside the prose, unless they are there already.
//
// CAI_EM_PROFILE names the run (results/<profile>); without it the newest is taken. Quarto runs this file with its own
// Deno; Node runs it too. Only modules that are part of both are used: nothing is downloaded.
(async () => {
  const fs = await import("node:fs");
  const path = await import("node:path");
  const process = (await import("node:process")).default;

  const stop = (message) => {
    console.error(`paper: ${message}`);
    process.exit(1);
  };
  const read = (file) => (fs.existsSync(file) ? fs.readFileSync(file, "utf8") : "");

  // Quarto starts it in the project's folder.
  const paper = [process.cwd(), process.env.QUARTO_PROJECT_DIR ?? ""].find((p) => p && fs.existsSync(path.join(p, "_quarto.yml")));
  if (!paper) stop("no _quarto.yml here: run `quarto render paper/` from the repository's top folder");
  const here = read(path.join(paper, "_generated", "sources.json"));
  const shown = here ? JSON.parse(here).profile : "";

  const results = process.env.CAI_EM_RESULTS || path.join(paper, "..", "results");
  const half = (profile) => path.join(results, profile, "11_report", "paper");
  const listing = (profile) => path.join(half(profile), "_generated", "sources.json");
  const profiles = fs.existsSync(results) ? fs.readdirSync(results).filter((p) => fs.existsSync(listing(p))) : [];
  const age = (profile) => fs.statSync(listing(profile)).mtimeMs;
  const newest = profiles.sort((a, b) => age(b) - age(a))[0];

  const wanted = process.env.CAI_EM_PROFILE || newest || shown;
  if (!wanted) stop("there are no results to show: run ./run_all.sh first");
  if (!profiles.includes(wanted)) {
    if (wanted === shown) return; // a paper that came with its numbers, without the results
    const there = profiles.length ? ` (there is: ${profiles.join(", ")})` : "";
    stop(`no results of profile ${wanted} under ${results}${there}: run ./run_all.sh ${wanted} first`);
  }
  if (read(listing(wanted)) === here && fs.existsSync(path.join(paper, "_variables.yml"))) return;

  const target = path.join(paper, "_generated");
  fs.rmSync(`${target}.new`, { recursive: true, force: true });
  fs.cpSync(path.join(half(wanted), "_generated"), `${target}.new`, { recursive: true });
  fs.rmSync(target, { recursive: true, force: true });
  fs.renameSync(`${target}.new`, target);
  fs.copyFileSync(path.join(half(wanted), "_variables.yml"), path.join(paper, "_variables.yml"));
  console.log(`paper: numbers of profile ${wanted}`);
})().catch((error) => {
  // Nothing that was foreseen: the page is rendered with what is there, and says at its top whose numbers it shows.
  console.error(`paper: prerender.js failed, _generated/ stays as it is: ${error}`);
});
