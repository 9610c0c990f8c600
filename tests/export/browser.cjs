// Opens a page, gives it pictures, and prints what it says of itself and of each: node browser.cjs URL PICTURE...
const puppeteer = require("puppeteer-core");

(async () => {
  const [url, ...pictures] = process.argv.slice(2);
  const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
  try {
    const page = await browser.newPage();
    const problems = [];
    page.on("pageerror", (error) => problems.push(String(error)));
    await page.goto(url);
    await page.waitForFunction(() => !document.querySelector("[role=status]").textContent.includes("being loaded"));
    if (pictures.length) {
      await (await page.$("input[type=file]")).uploadFile(...pictures);
      await page.waitForFunction((count) => document.querySelectorAll("figure").length === count, {}, pictures.length);
    }
    const said = await page.evaluate(() => ({
      status: document.querySelector("[role=status]").textContent,
      figures: [...document.querySelectorAll("figure")].map((figure) => [
        figure.querySelector("img").alt,
        [...figure.querySelectorAll("li")].map((line) => line.textContent),
        figure.textContent,
      ]),
    }));
    console.log(JSON.stringify({ ...said, problems }));
  } finally {
    await browser.close();
  }
})();
